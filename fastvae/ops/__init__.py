"""Op families: the reference, schema, backends, autograd and public function of each in one file."""
