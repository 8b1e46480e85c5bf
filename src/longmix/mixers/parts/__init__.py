"""What mixers share: their contract, bases, and parts."""
