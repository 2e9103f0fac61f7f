"""Room `cost`: what will it take, in time, memory and disk? Estimates, before anything is run."""
