//! Any bytes as a page of the API: the list that they make is one that Prometheus takes. `fuzz/` and `tests/it/properties.rs` run
//! this.

use baletheus::discovery::exporter;
use baletheus::discovery::inventory::Inventory;
use baletheus::discovery::labels;
use baletheus::discovery::target::{Address, Rules};

use super::fakes::{self, Bytes};
use super::rules;

/// Kinds of address, each with what a page may hold: full pages, some that are cut short, single devices too large.
pub const KINDS: [(Address, usize); 4] =
    [(Address::Vpn, 1000), (Address::Public, 4), (Address::Lan, 1000), (Address::Vpn, 0)];

/// Two refreshes, over pages that are separated by a zero byte: either a refresh fails, or the list keeps the rules, and is the same
/// when it is made again. Returns the largest number of targets.
pub fn check(bytes: &[u8], (address, most): (Address, usize)) -> Result<usize, String> {
    let rules = Rules {
        address,
        exporters: exporter::parse_list("node:9100,app:8080/internal/metrics").expect("exporters"),
        labels: labels::plain().step_by(2).map(|label| label.name).collect(),
        ..fakes::rules()
    };
    let (mut kept, mut most_targets) = (Inventory::default(), 0);
    for body in bytes.splitn(2, |byte| *byte == 0) {
        if kept.refresh(&mut Bytes { body, most }, &rules).is_err() {
            continue;
        }
        let list = fakes::list(&kept);
        most_targets = most_targets.max(rules::check(&list, &rules)?.len());
        // A full page may end where the one before it did, and more would have to come.
        if most < 1000 || kept.entries().count() >= 500 {
            continue;
        }
        let mut fresh = Inventory::default();
        let made_again = fresh.refresh(&mut Bytes { body, most }, &rules).is_ok();
        let same = fakes::list(&fresh) == list;
        if !(made_again && same) {
            return Err("another list when it is made afresh".to_owned());
        }
    }
    Ok(most_targets)
}
