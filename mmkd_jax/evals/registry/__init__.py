"""Records of public sets, one JSON file a family; `mmkd_jax.evals.sets` says what a record holds."""
