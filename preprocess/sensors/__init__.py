"""Tables of sensors, one YAML file each; preprocess.sensor reads them."""
