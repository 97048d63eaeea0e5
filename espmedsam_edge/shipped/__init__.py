"""The weights that come with the program: packed, assembled into bundles on the device."""
