"""The mixture-of-experts layer: router -> Routing -> dispatcher -> experts -> combine."""
