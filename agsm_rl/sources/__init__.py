"""Where batches come from: pairs of a data set, preferences, rollouts of the policy."""
