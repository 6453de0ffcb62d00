//! End to end: every test makes a computing node of its own (`Host`), and at its end nothing may be left over.
//!
//! Requirement tags (M1 … M10, D8, D9 …) in a test's comment name what it proves. The tests run one after another
//! (`--test-threads=1`) as root, after `cargo build --release` of the programs; `cargo xtask test` sees to both.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod components;
mod crash_consistency;
mod detach;
mod failed_flush;
mod failed_upgrades;
mod file_semantics;
mod filesystems;
mod handovers;
mod hanging_tests;
mod hostile_peers;
mod identity;
mod invariants;
mod kills_fio;
mod limits;
mod logs;
mod mappings;
mod marks;
mod module_deaths;
mod nbd_clients;
mod nbd_guest;
mod nbd_hostile;
mod nbd_kills;
mod nbd_nodes;
mod nbd_upgrades;
mod ownership;
mod ownership_paths;
mod plain_nodes;
mod power_loss;
mod privileges;
mod qemu;
mod records;
mod refusals;
mod resize;
mod rollback;
mod slow_stores;
mod soak;
mod stopped_core;
mod stores;
mod suspension;
mod trouble;
mod unprivileged;
mod upgrades_fio;
