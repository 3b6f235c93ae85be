"""Target profiles, one TOML each: what is known of a target, with source and date; read by thinet_deploy.target."""
