"""How bytes move between ranks: the interface, the transports behind it, and the ways in from above."""
