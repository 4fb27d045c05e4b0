"""Studies: does what this project claims hold, measured here, with seeds and the command that repeats it?"""
