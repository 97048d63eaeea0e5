"""One run from sources to sinks: what is to be written, the schedule, the threads and their bounds."""
