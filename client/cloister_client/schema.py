"""The ledger's tables, and the rules by which SQLite keeps them to what the ledger does: rows are added and closed, never changed."""

from __future__ import annotations

SCHEMA = """
CREATE TABLE IF NOT EXISTS event (
  seq INTEGER PRIMARY KEY CHECK (seq >= 1),
  head BLOB NOT NULL CHECK (length(head) = 32),
  record BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS fact (
  seq INTEGER PRIMARY KEY REFERENCES event (seq),
  kind TEXT NOT NULL,
  salt BLOB NOT NULL CHECK (length(salt) = 32),
  record BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS source (
  path TEXT NOT NULL PRIMARY KEY,
  text TEXT NOT NULL,
  label TEXT NOT NULL,
  field TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  field TEXT NOT NULL,
  added_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS unit (
  tag BLOB NOT NULL PRIMARY KEY CHECK (length(tag) = 32),
  block INTEGER NOT NULL REFERENCES block (id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS text (
  tag BLOB NOT NULL PRIMARY KEY CHECK (length(tag) = 32),
  block INTEGER NOT NULL REFERENCES block (id),
  batch INTEGER NOT NULL CHECK (batch >= 1)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entry (
  id INTEGER PRIMARY KEY,
  state TEXT NOT NULL CHECK (state IN ('reserved', 'spent', 'lost', 'void')),
  run TEXT NOT NULL,
  round INTEGER NOT NULL CHECK (round >= 1),
  plan TEXT NOT NULL CHECK (length(plan) = 64),
  base TEXT NOT NULL CHECK (length(base) = 64),
  noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
  sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
  steps INTEGER NOT NULL CHECK (steps >= 1),
  record BLOB NOT NULL,
  update_digest TEXT,
  reserved_at REAL NOT NULL,
  closed_at REAL,
  CHECK ((state = 'spent') = (update_digest IS NOT NULL))
);
CREATE TABLE IF NOT EXISTS charge (
  entry INTEGER NOT NULL REFERENCES entry (id),
  block INTEGER NOT NULL REFERENCES block (id),
  admitted REAL NOT NULL,
  cap REAL NOT NULL CHECK (admitted <= cap),
  delta REAL NOT NULL,
  PRIMARY KEY (entry, block)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS noised (
  entry INTEGER NOT NULL REFERENCES entry (id),
  name TEXT NOT NULL,
  noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
  PRIMARY KEY (entry, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (
  seq INTEGER PRIMARY KEY,
  log TEXT NOT NULL,
  size INTEGER NOT NULL CHECK (size >= 0),
  root TEXT NOT NULL CHECK (length(root) = 64)
);
CREATE TABLE IF NOT EXISTS receipt (
  plan TEXT NOT NULL PRIMARY KEY,
  record TEXT NOT NULL CHECK (length(record) = 64)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempt (
  plan TEXT NOT NULL PRIMARY KEY CHECK (length(plan) = 64),
  newest INTEGER NOT NULL CHECK (newest >= 1)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS one_open_or_spent ON entry (plan) WHERE state IN ('reserved', 'spent');
CREATE TRIGGER IF NOT EXISTS entry_stays BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'entries are for good'); END;
CREATE TRIGGER IF NOT EXISTS entry_not_replaced BEFORE INSERT ON entry WHEN EXISTS (SELECT 1 FROM entry WHERE id = NEW.id
  OR (NEW.state IN ('reserved', 'spent') AND plan = NEW.plan AND state IN ('reserved', 'spent')))
  BEGIN SELECT RAISE(ABORT, 'entries are for good'); END;
CREATE TRIGGER IF NOT EXISTS entry_only_closes BEFORE UPDATE ON entry WHEN OLD.state <> 'reserved' OR NEW.id <> OLD.id
  OR NEW.noise_multiplier <> OLD.noise_multiplier OR NEW.sample_rate <> OLD.sample_rate OR NEW.steps <> OLD.steps
  OR NEW.plan <> OLD.plan OR NEW.run <> OLD.run OR NEW.reserved_at <> OLD.reserved_at
  OR NEW.base <> OLD.base OR NEW.record <> OLD.record
  BEGIN SELECT RAISE(ABORT, 'entries only close'); END;
"""
SCHEMA += """CREATE TRIGGER IF NOT EXISTS attempt_stays BEFORE DELETE ON attempt BEGIN SELECT RAISE(ABORT, 'for good'); END;
CREATE TRIGGER IF NOT EXISTS attempt_only_grows BEFORE UPDATE ON attempt WHEN NEW.plan <> OLD.plan OR NEW.newest <= OLD.newest
  BEGIN SELECT RAISE(ABORT, 'attempts only grow'); END;
CREATE TRIGGER IF NOT EXISTS attempt_not_replaced BEFORE INSERT ON attempt WHEN EXISTS (SELECT 1 FROM attempt WHERE plan = NEW.plan)
  BEGIN SELECT RAISE(ABORT, 'for good'); END;
"""
for _table, _key in (
    ("event", "seq = NEW.seq"),
    ("fact", "seq = NEW.seq"),
    ("unit", "tag = NEW.tag"),
    ("text", "tag = NEW.tag"),
    ("block", "id = NEW.id OR name = NEW.name"),
    ("charge", "entry = NEW.entry AND block = NEW.block"),
    ("noised", "entry = NEW.entry AND name = NEW.name"),
    ("seen", "seq = NEW.seq"),
    ("receipt", "plan = NEW.plan"),
):
    SCHEMA += f"""CREATE TRIGGER IF NOT EXISTS {_table}_stays BEFORE DELETE ON {_table} BEGIN SELECT RAISE(ABORT, 'for good'); END;
CREATE TRIGGER IF NOT EXISTS {_table}_fixed BEFORE UPDATE ON {_table} BEGIN SELECT RAISE(ABORT, 'for good'); END;
CREATE TRIGGER IF NOT EXISTS {_table}_not_replaced BEFORE INSERT ON {_table} WHEN EXISTS (SELECT 1 FROM {_table} WHERE {_key})
  BEGIN SELECT RAISE(ABORT, 'for good'); END;
"""  # noqa: S608  # our own names
