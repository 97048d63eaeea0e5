"""Networks that torch's Inductor compiles ahead of time on the machine that runs them."""
