"""The commands for much that comes from elsewhere: the DICOM network, a cluster, other servers."""
