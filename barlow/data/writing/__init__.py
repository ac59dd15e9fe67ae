"""Writing shards: plan (what is asked for and what will be written), write (doing it), and what these stand on."""
