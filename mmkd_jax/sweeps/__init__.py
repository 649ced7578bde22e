"""Sweeps: many runs of one config file, made on this machine or a cluster and told in one table.

`grids` says which runs (a config file's `sweep()` yields overrides), `plan` what commands they take and what they
share, `devices` where they run, `runner` runs them here, `submit` and `job` on a cluster, `table` collects.
"""
