"""Where data sets come from, one file for each kind of DATA argument; a source is found by being here."""
