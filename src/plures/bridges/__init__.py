"""Other people's formats and hosts, one file each."""
