"""ThiNet: which filters go (graph → statistics → selection), and the thinner network (reconstruction → plan)."""
