"""The paper's tables and figures, each number beside those of weak protocols and of the strongest attack."""
