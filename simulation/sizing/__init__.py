"""How many prefill and how many decode workers: laws from measured points, the closed form, and a search by replays."""
