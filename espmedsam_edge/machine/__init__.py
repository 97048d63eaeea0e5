"""What this computer is: its environment, cores, the cache's place, what an installation lacks."""
