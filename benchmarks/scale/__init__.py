"""Two hosts of one core each on one machine, joined by a link whose rate is set: the scale model of a GPU node."""
