"""Which head to ship as a draft: acceptance, times of steps, and the expected speed-up of speculative decoding."""
