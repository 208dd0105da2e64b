"""Files for devices, made from checkpoints and compared with them."""
