"""From plain values to networks: blocks, backbones, sites, insertion, architectures."""
