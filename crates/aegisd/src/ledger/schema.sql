CREATE TABLE invite (
  id TEXT PRIMARY KEY, code_hash BLOB NOT NULL UNIQUE, status TEXT NOT NULL,
  created_by TEXT NOT NULL, label TEXT, offer TEXT NOT NULL,
  created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL,
  redeemed_at INTEGER, redeemed_by TEXT, guest_id TEXT
) STRICT;
CREATE INDEX invite_due ON invite (expires_at) WHERE status = 'active';
CREATE INDEX invite_status ON invite (status, id);

CREATE TABLE guest (
  id TEXT PRIMARY KEY, invite TEXT NOT NULL REFERENCES invite (id), name TEXT NOT NULL,
  token_hash BLOB NOT NULL UNIQUE, status TEXT NOT NULL, instance TEXT, detail TEXT NOT NULL,
  created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, stopped_at INTEGER
) STRICT;
CREATE INDEX guest_due ON guest (expires_at);
CREATE INDEX guest_status ON guest (status, id);

CREATE TABLE instance (
  id TEXT PRIMARY KEY, tree TEXT NOT NULL, guest TEXT, parent TEXT, handle TEXT,
  wanted TEXT NOT NULL, state TEXT NOT NULL, memory_mb INTEGER NOT NULL, disk_bytes INTEGER NOT NULL,
  spec TEXT NOT NULL, detail TEXT NOT NULL,
  created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, ends_at INTEGER
) STRICT;
CREATE UNIQUE INDEX instance_handle ON instance (handle) WHERE handle IS NOT NULL AND state <> 'gone';
CREATE INDEX instance_guest ON instance (guest);
CREATE INDEX instance_tree ON instance (tree);
CREATE INDEX instance_parent ON instance (parent) WHERE parent IS NOT NULL;
CREATE INDEX instance_due ON instance (ends_at) WHERE ends_at IS NOT NULL;
CREATE INDEX instance_live ON instance (state) WHERE state <> 'gone';

-- Values are AES-256-GCM under a key that is not in this file.
CREATE TABLE secret (
  name TEXT PRIMARY KEY, nonce BLOB NOT NULL, sealed BLOB NOT NULL,
  proxy INTEGER NOT NULL, hosts TEXT NOT NULL, updated_at INTEGER NOT NULL
) STRICT;

-- Append-only: the audit trail, one hash chain per tree.
CREATE TABLE event (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, tree TEXT NOT NULL, position INTEGER NOT NULL,
  at INTEGER NOT NULL, actor TEXT NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL,
  data TEXT NOT NULL, hash BLOB NOT NULL, UNIQUE (tree, position)
) STRICT;
