"""The end of a run: signals, exit codes, faults, loss spikes and stalls."""
