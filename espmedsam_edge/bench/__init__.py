"""How fast: measuring, device times, roofline, power, competitors, report and plot."""
