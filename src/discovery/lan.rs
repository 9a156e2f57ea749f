//! Which of the addresses that a device reports is scraped in the LAN. A device can report any address, the stack's own and a
//! stranger's among them, so only addresses in networks of devices are taken.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::{io, mem};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use log::Level;

use super::entry::{DevicePage, Entry};
use super::left_out::{LeftOut, LeftOutReason};
use crate::balena::Device;
use crate::values::{BadValue, items};

/// The networks that devices may be in, unless an option names others: private, carrier-grade and unique-local addresses.
pub const PRIVATE: &str = "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7";

/// Networks that no device is in, whatever an option says: this host, loopback, link-local, multicast and reserved addresses, and
/// the metadata services of clouds, which give their credentials to whoever asks.
const NEVER: [IpNet; 16] = [
    v4([100, 100, 100, 200], 32), // Alibaba Cloud
    v4([168, 63, 129, 16], 32),   // Azure
    v4([192, 0, 0, 0], 24),       // Oracle Cloud, and IETF protocols
    v6([0xfd00, 0x0ec2], 32),     // AWS
    v6([0xfd20, 0x00ce], 32),     // Google Cloud
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([224, 0, 0, 0], 4),
    v4([240, 0, 0, 0], 4),
    v6([0, 0], 8),       // loopback, IPv4-mapped and NAT64
    v6([0x2001, 0], 32), // Teredo
    v6([0x2002, 0], 16), // 6to4
    v6([0xfe80, 0], 10),
    v6([0xfec0, 0], 10),
    v6([0xff00, 0], 8),
];

/// Why an address is refused that no device has. An explanation does not show it.
const NO_DEVICE: &str = "no address of a device";
/// Addresses that an explanation shows.
const MAX_SHOWN: usize = 3;

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::new(a, b, c, d), prefix))
}

const fn v6([a, b]: [u16; 2], prefix: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0), prefix))
}

/// Each address of this machine, with its network.
pub fn own_addresses() -> io::Result<Vec<IpNet>> {
    let interfaces = if_addrs::get_if_addrs()?;
    let network = |interface: &if_addrs::Interface| {
        let prefix = match &interface.addr {
            if_addrs::IfAddr::V4(address) => address.prefixlen,
            if_addrs::IfAddr::V6(address) => address.prefixlen,
        };
        IpNet::new(interface.ip(), prefix).ok()
    };
    Ok(interfaces.iter().filter_map(network).collect())
}

#[derive(Clone, Debug)]
pub struct Lan {
    pub networks: Vec<IpNet>,
    /// This machine's addresses, each with its network. In a container these are the stack's networks and no LAN, so devices are
    /// in them only if `networks` names them, or a part of them; this machine itself is a device only if its address alone is
    /// named.
    pub own: Vec<IpNet>,
    /// Whether the log has said that they cannot be read.
    pub is_told: bool,
}

impl Lan {
    /// Reads this machine's addresses again, and returns whether they have changed. Each container that starts adds link-local
    /// ones, which are refused in any case.
    pub fn renew_own(&mut self) -> bool {
        let mut read = match own_addresses() {
            Ok(addresses) => addresses,
            Err(error) => {
                let level = if mem::replace(&mut self.is_told, true) { Level::Debug } else { Level::Warn };
                log::log!(level, "cannot read this machine's addresses, so those of before count: {error}");
                return false;
            }
        };
        self.is_told = false;
        read.retain(|own| !NEVER.iter().any(|network| network.contains(own)));
        read.sort_unstable();
        let has_changed = read != self.own;
        self.own = read;
        has_changed
    }

    /// The address of a device's targets: its first IPv4 address that is taken, else its first IPv6 address.
    pub fn address(&self, device: &Device) -> Result<IpAddr, LeftOut> {
        let (mut v6, mut refused, mut more) = (None, Vec::new(), 0);
        for address in reported(device) {
            match (self.refusal(address).as_deref(), address) {
                (None, IpAddr::V4(_)) => return Ok(address),
                (None, IpAddr::V6(_)) => v6 = v6.or(Some(address)),
                (Some(NO_DEVICE), _) => {}
                (Some(_), _) if refused.len() == MAX_SHOWN => more += 1,
                (Some(why), _) => refused.push(format!("{address} ({why})")),
            }
        }
        if let Some(address) = v6 {
            return Ok(address);
        }
        if refused.is_empty() {
            return Err(LeftOutReason::NoLanAddress.into());
        }
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        let detail = (refused.join(", ") + &more).into();
        Err(LeftOut { reason: LeftOutReason::LanAddressRefused, detail })
    }

    /// Why an address is refused, if it is.
    fn refusal(&self, address: IpAddr) -> Option<Cow<'static, str>> {
        let mut known = self.networks.iter().copied().chain(self.own.iter().map(IpNet::trunc));
        if NEVER.iter().any(|network| network.contains(&address)) || known.any(|network| is_end(&network, address)) {
            return Some(NO_DEVICE.into());
        }
        let mut holding = self.networks.iter().filter(|network| network.contains(&address)).peekable();
        if holding.peek().is_none() {
            return Some("outside of --lan-network".into());
        }
        if self.own.iter().any(|own| own.addr() == address) {
            let is_named = holding.any(|network| network.prefix_len() == network.max_prefix_len());
            return (!is_named).then(|| "this machine itself, which --lan-network does not name alone".into());
        }
        let own = self.own.iter().map(IpNet::trunc).find(|own| own.contains(&address))?;
        let is_named = holding.any(|network| own.contains(network));
        (!is_named).then(|| format!("in {own}, a network of this machine that --lan-network does not name").into())
    }
}

/// The addresses that a device reports, in its order.
pub fn reported(device: &Device) -> impl Iterator<Item = IpAddr> {
    let text = device.ip_address.as_deref().unwrap_or_default();
    text.split_whitespace().filter_map(|text| text.parse().ok())
}

/// Whether an address is that of a network, or its broadcast address.
fn is_end(network: &IpNet, address: IpAddr) -> bool {
    // Point-to-point links and single addresses have neither.
    let has_ends = network.prefix_len() + 1 < network.max_prefix_len();
    has_ends && (address == network.network() || address.is_ipv4() && address == network.broadcast())
}

/// Reads a comma-separated list of networks.
///
/// # Errors
/// An item is no network that a device can be in.
pub fn networks(text: &str) -> Result<Vec<IpNet>, BadValue> {
    items(text).map(network).collect()
}

fn network(text: &str) -> Result<IpNet, BadValue> {
    let network: IpNet = text.parse().map_err(|_| format!("{text:?} is no network such as 192.168.1.0/24"))?;
    if network != network.trunc() {
        return Err(format!("{text} has bits beside its prefix: the network is {}", network.trunc()).into());
    }
    match NEVER.iter().find(|never| never.contains(&network)) {
        Some(never) => Err(format!("{text} is within {never}, which no device is in").into()),
        None => Ok(network),
    }
}

/// Addresses of targets that other devices report, too, as after a lease that another device has now, would show the data of the one
/// as that of the other: leaves out the devices that are not online while another one with their address is, target or not. Where
/// nobody knows which device has the address, all stay. Gives a warning for each such address.
pub fn leave_out_shared(pages: &mut [Arc<DevicePage>]) -> Vec<String> {
    let mut by_address: HashMap<IpAddr, Vec<&Arc<Entry>>> = HashMap::new();
    for entry in pages.iter().flat_map(|page| &page.entries) {
        for address in &entry.addresses {
            by_address.entry(*address).or_default().push(entry);
        }
    }
    by_address.retain(|_, entries| entries.len() > 1);
    let mut taken = HashSet::new();
    let mut warnings = Vec::new();
    for (address, entries) in &by_address {
        let is_known = entries.iter().any(|entry| entry.online == Some(true));
        let scraped = entries.iter().filter(|entry| is_target(entry, *address));
        let (gone, left): (Vec<&&Arc<Entry>>, Vec<_>) =
            scraped.partition(|entry| is_known && entry.online != Some(true));
        let what = match (&*gone, &*left) {
            ([], [] | [_]) => continue,
            (_, []) => "what is not online is not scraped there",
            (_, [_]) => "only the one that is online is scraped",
            _ => "one of them shows the data of another; --address vpn tells them apart",
        };
        taken.extend(gone.iter().filter_map(|entry| entry.id()));
        let names: Vec<_> = entries.iter().take(3).map(|entry| entry.shown()).collect();
        warnings.push(format!("{} devices report the address {address} ({}): {what}", entries.len(), names.join(", ")));
    }
    if taken.is_empty() {
        return warnings;
    }
    for page in pages {
        let is_gone = |entry: &Entry| !entry.targets().is_empty() && entry.id().is_some_and(|id| taken.contains(&id));
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

/// Whether the targets of a device are at this address.
fn is_target(entry: &Entry, address: IpAddr) -> bool {
    !entry.targets().is_empty() && entry.addresses.first() == Some(&address)
}
