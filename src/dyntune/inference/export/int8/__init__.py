"""int8 for the runtimes that offer it: the linear layers of a backbone's blocks in integers, all else in fp32."""
