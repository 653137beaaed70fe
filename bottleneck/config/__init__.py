"""The typed schema of a run, and the checks that types cannot express."""
