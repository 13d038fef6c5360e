"""Baton's processes as pods: ``backend`` sees and scales them, ``operator`` scales by the scheduler's word."""
