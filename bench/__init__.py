"""The figures in README: ``make bench``. Timings are medians, as ratios against a peer in the same run where there is one."""
