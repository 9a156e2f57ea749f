//! LAN addresses that several devices report, as after a lease that another device has now: the data of the one would be shown as
//! that of the other.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::entry::{DevicePage, Entry};
use super::left_out::{LeftOut, LeftOutReason};

/// Leaves out the devices that are offline while another one with their address is online. Where nobody knows which device has
/// the address, all stay. Gives a warning for each such address.
pub fn leave_out(pages: &mut [Arc<DevicePage>]) -> Vec<String> {
    let mut by_address: HashMap<IpAddr, Vec<&Arc<Entry>>> = HashMap::new();
    for entry in pages.iter().flat_map(|page| &page.entries) {
        if let Some(address) = entry.address {
            by_address.entry(address).or_default().push(entry);
        }
    }
    by_address.retain(|_, entries| entries.len() > 1);
    let mut offline = HashSet::new();
    let mut warnings = Vec::new();
    for (address, entries) in &by_address {
        let names: Vec<_> = entries.iter().take(3).map(|entry| entry.shown()).collect();
        let is_known = entries.iter().any(|entry| entry.online == Some(true));
        let gone = entries.iter().filter(|entry| is_known && entry.online != Some(true));
        let before = offline.len();
        offline.extend(gone.filter_map(|entry| entry.id()));
        let what = if offline.len() - before + 1 == entries.len() {
            "only the one that is online is scraped"
        } else {
            "one of them shows the data of another; --address vpn tells them apart"
        };
        warnings.push(format!("{} devices report the address {address} ({}): {what}", entries.len(), names.join(", ")));
    }
    if offline.is_empty() {
        return warnings;
    }
    for page in pages {
        let is_gone = |entry: &Entry| entry.address.is_some() && entry.id().is_some_and(|id| offline.contains(&id));
        if page.entries.iter().any(|entry| is_gone(entry)) {
            let entries = page.entries.iter().map(|entry| {
                if !is_gone(entry) {
                    return entry.clone();
                }
                let mut entry = Entry::clone(entry);
                entry.left_out = Some(LeftOut::from(LeftOutReason::LanAddressTaken).into());
                entry.into()
            });
            *page = DevicePage { entries: entries.collect(), warnings: page.warnings.clone() }.into();
        }
    }
    warnings
}
