"""The demo: a legacy system, the bridge and a new system on one machine, with nothing installed by hand."""
