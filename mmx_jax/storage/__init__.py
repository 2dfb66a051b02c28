"""Files as everything else here reads and writes them: strict JSON, folders with one owner, arrays of orbax items."""
