"""How ranks meet, who is there, and what is said where somebody is not."""
