"""What the front door costs: CPU of a front proxy alone, beside other front ends, over engines that compute nothing."""
