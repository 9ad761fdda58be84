"""One file per objective: the pure loss first, then the class that feeds it from a policy and a batch."""
