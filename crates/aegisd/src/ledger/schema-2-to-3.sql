-- Secrets of the host. Values are AES-256-GCM under a key that is not in this file.
CREATE TABLE secret (
  name TEXT PRIMARY KEY, nonce BLOB NOT NULL, sealed BLOB NOT NULL,
  proxy INTEGER NOT NULL, hosts TEXT NOT NULL, updated_at INTEGER NOT NULL
) STRICT;
