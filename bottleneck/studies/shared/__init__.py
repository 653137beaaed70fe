"""What every study uses: keys and checks, series of checkpoints, text, partial results, output."""
