//! What Prometheus takes as a target file, written down a second time as it was measured, and the project's own rules on
//! top of it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::net::IpAddr;

use baletheus::discovery::labels;
use baletheus::discovery::target::{Address, Rules};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// A target group as Prometheus understands it, with the one target that ours have.
pub struct Group {
    pub target: String,
    pub host: String,
    pub labels: BTreeMap<String, String>,
}

impl Group {
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    pub fn id(&self) -> Result<u64, String> {
        let id = self.label("__meta_balena_device_id").and_then(|id| id.parse().ok());
        id.ok_or_else(|| format!("{}: no id", self.target))
    }
}

/// All that an object holds, in its order; `serde_json`'s own map would keep the last of two equal keys.
struct Pairs<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for All<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(All(std::marker::PhantomData))
    }
}

macro_rules! ensure {
    ($holds:expr, $($why:tt)*) => {
        if !$holds {
            return Err(format!($($why)*));
        }
    };
}

/// Reads a list by the rules of `file_sd_configs`. One error, and Prometheus would not take the file, or a target of it.
pub fn groups(text: &[u8]) -> Result<Vec<Group>, String> {
    let groups: Vec<Pairs<Box<RawValue>>> = serde_json::from_slice(text).map_err(|error| format!("a list: {error}"))?;
    let group = |Pairs(group): Pairs<Box<RawValue>>| {
        let [(first, targets), (second, labels)] = group.as_slice() else {
            return Err(format!("{} keys in a group", group.len()));
        };
        ensure!([first, second] == ["targets", "labels"], "keys {first:?} and {second:?}");
        let targets: Vec<String> =
            serde_json::from_str(targets.get()).map_err(|error| format!("targets {targets}: {error}"))?;
        let [target] = <[String; 1]>::try_from(targets).map_err(|targets| format!("targets {targets:?}"))?;
        // a label's value is text, nothing else
        let Pairs(pairs): Pairs<String> =
            serde_json::from_str(labels.get()).map_err(|error| format!("{target}: {labels}: {error}"))?;
        let count = pairs.len();
        let labels: BTreeMap<String, String> = pairs.into_iter().collect();
        ensure!(labels.len() == count, "{target}: a label twice");
        for (name, value) in &labels {
            ensure!(is_label_name(name), "{target}: label {name:?}");
            let duration = ["__scrape_interval__", "__scrape_timeout__"].contains(&name.as_str());
            ensure!(!duration || duration_of(value).is_some(), "{target}: {name} {value:?}");
        }
        let (host, port) = target.rsplit_once(':').ok_or_else(|| format!("{target:?} has no port"))?;
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        ensure!(digits && port.parse::<u16>().is_ok_and(|port| port > 0), "port {port:?}");
        ensure!(!host.is_empty() && !host.contains(['/', '@', '?', '#', ' ']), "host {host:?}");
        let host = host.to_owned();
        Ok(Group { target, host, labels })
    };
    groups.into_iter().map(group).collect()
}

/// The rules of Prometheus, and the project's own, as far as the list alone tells.
pub fn check(text: &[u8], rules: &Rules) -> Result<Vec<Group>, String> {
    let groups = groups(text)?;
    let (mut last, mut seen) = (0, HashSet::new());
    for group in &groups {
        let Group { target, host, labels } = group;
        for (name, value) in labels {
            let most = if name == "__metrics_path__" { 1024 } else { 512 };
            ensure!(value.len() <= most, "label {name} has {} bytes", value.len());
            // the scrape configuration and the exporters have these, and Prometheus the ones below
            ensure!(!["device", "instance"].contains(&name.as_str()), "label {name}");
            let known = ["__scheme__", "__metrics_path__", "__scrape_interval__", "__scrape_timeout__"];
            let own = name.starts_with("__meta_balena_") || known.contains(&name.as_str());
            ensure!(own || !name.starts_with("__"), "label {name}");
        }
        let label = |name: &str| group.label(name);
        let id = group.id()?;
        ensure!(last <= id, "{id} after {last}");
        last = id;
        let uuid = label("uuid").ok_or("no uuid")?;
        let hex = |c: char| matches!(c, '0'..='9' | 'a'..='f');
        ensure!(matches!(uuid.len(), 32 | 62) && uuid.chars().all(hex), "uuid {uuid:?}");
        ensure!(seen.insert((id, label("job"), target)), "{target} twice");
        ensure!(label("job") == label("__meta_balena_exporter"), "{target}: job {:?}", label("job"));
        match rules.address {
            Address::Vpn => ensure!(*host == format!("{uuid}.balena"), "{target} is not in the VPN"),
            Address::Public => ensure!(*target == format!("{uuid}.{}:443", rules.public_domain), "public {target}"),
            Address::Lan => {
                let address: IpAddr = host.trim_matches(['[', ']']).parse().map_err(|_| format!("host {host:?}"))?;
                ensure!((host.starts_with('[') && host.ends_with(']')) == address.is_ipv6(), "brackets of {host:?}");
                let none = address.is_loopback() || address.is_unspecified() || address.is_multicast();
                ensure!(!none, "nobody is at {address}");
            }
        }
        let scheme = label("__scheme__");
        ensure!(matches!(scheme, None | Some("http" | "https")), "{scheme:?}");
        ensure!(rules.address != Address::Public || scheme == Some("https"), "public without https");
        ensure!(label("__metrics_path__").is_none_or(|path| path.starts_with('/')), "{:?}", label("__metrics_path__"));
        if let Some(text) = label("__scrape_interval__") {
            let interval = duration_of(text).filter(|interval| *interval >= 5000);
            ensure!(interval.is_some(), "interval {text:?}");
            let due = if interval < Some(10_000) { text } else { "10s" };
            ensure!(label("__scrape_timeout__") == Some(due), "time-out {:?}", label("__scrape_timeout__"));
        } else {
            ensure!(label("__scrape_timeout__").is_none(), "a time-out of its own");
        }
        for plain in labels::plain() {
            let chosen = plain.name == "uuid" || rules.labels.contains(&plain.name);
            let other = if chosen { format!("__meta_balena_{}", plain.name) } else { plain.name.to_owned() };
            ensure!(label(&other).is_none(), "{} is not where --labels puts it", plain.name);
        }
    }
    Ok(groups)
}

/// Prometheus' duration, `((y)(w)(d)(h)(m)(s)(ms))` with each part optional, in milliseconds.
fn duration_of(text: &str) -> Option<u128> {
    let units = [
        ("y", 31_536_000_000),
        ("w", 604_800_000),
        ("d", 86_400_000),
        ("h", 3_600_000),
        ("m", 60_000),
        ("s", 1000),
        ("ms", 1),
    ];
    let (mut rest, mut sum) = (text, 0_u128);
    for (unit, millis) in units {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at(digits);
        let Some(after) = after.strip_prefix(unit) else { continue };
        // "5ms" is no minutes
        if number.is_empty() || unit == "m" && after.starts_with('s') {
            continue;
        }
        sum += number.parse::<u128>().ok()? * millis;
        rest = after;
    }
    (rest.is_empty() && !text.is_empty() && sum <= i64::MAX as u128 / 1_000_000).then_some(sum)
}

fn is_label_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    name.chars().all(legal) && !name.starts_with(|c: char| c.is_ascii_digit()) && !name.is_empty()
}
