"""Speed, as ratios against peers in one run; never a timed test. `make bench` runs all of it."""
