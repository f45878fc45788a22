"""Lightning callbacks: moving average of the weights, throughput, progress bar, preemption."""
