//! Options → the checked settings of each command. All errors are reported together, before any work.

mod options;
mod sources;

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::ArgMatches;
use reqwest::Url;
use rustls::pki_types::{CertificateDer, pem::PemObject};

use crate::balena::Api;
use crate::balena::selection::{FleetRef, Selection, TagFilter};
use crate::discovery::exporter::{self, Exporter};
use crate::discovery::labels::{self, LABELS, LabelSet};
use crate::discovery::lan::{self, Lan};
use crate::discovery::tags::OwnTags;
use crate::discovery::target::{Address, Rules};
use crate::key::{ApiKey, KeySource};
use crate::net::proxy::Proxies;
use crate::values::{boolean, duration, interval, items, one_of};
use crate::{check, logging, net, status, tunnel};
pub use options::{OPTIONS, Opt, Verb, command};
use sources::Sources;

/// The environment.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The settings of discovery.
#[derive(Debug)]
pub struct Discovery {
    /// How the API is reached.
    pub api: Api,
    /// Which devices are asked for.
    pub selection: Selection,
    /// How devices become targets.
    pub rules: Rules,
    /// Whether labels of services are read.
    pub service_labels: bool,
    /// Path of the target file.
    pub sd_file: PathBuf,
    /// Its permissions.
    pub sd_file_mode: u32,
    /// Whether a list without targets may replace one that has some.
    pub write_empty: bool,
    /// From the start of one refresh to the start of the next; none means a single refresh.
    pub refresh: Option<Duration>,
    /// Whether the list goes to standard output and no file is touched.
    pub dry_run: bool,
    /// The log.
    pub log: logging::Settings,
    /// The status endpoint.
    pub status: status::Settings,
    /// balena's VPN proxy, for `check`.
    pub tunnel: Url,
    /// What is allowed but looks like a mistake; logged once at the start.
    pub warnings: Vec<String>,
}

/// Reads the options of discovery.
///
/// # Errors
/// One line for each mistake.
pub fn discovery(matches: &ArgMatches, var: Variables) -> Result<Discovery, Vec<String>> {
    read(Verb::Discover, matches, var, read_discovery)
}

/// Reads the options of `check`.
///
/// # Errors
/// One line for each mistake.
pub fn check(matches: &ArgMatches, var: Variables) -> Result<check::Settings, Vec<String>> {
    read(Verb::Check, matches, var, |from| {
        let discovery = read_discovery(from);
        let through_tunnel = discovery.rules.address == Address::Vpn;
        let mut warnings = discovery.warnings;
        warnings.extend(unencrypted(&discovery.tunnel).filter(|_| through_tunnel));
        check::Settings {
            api: discovery.api,
            selection: discovery.selection,
            rules: discovery.rules,
            service_labels: discovery.service_labels,
            tunnel: discovery.tunnel,
            json: matches.get_flag("json"),
            log: discovery.log,
            warnings,
        }
    })
}

/// Reads the options of `tunnel`.
///
/// # Errors
/// One line for each mistake.
pub fn tunnel(matches: &ArgMatches, var: Variables) -> Result<tunnel::Settings, Vec<String>> {
    read(Verb::Tunnel, matches, var, |from| {
        let url = from.one("tunnel-url", api_url);
        let (proxies, mut warnings) = Proxies::from_env(from.var);
        warnings.extend(unencrypted(&url));
        tunnel::Settings {
            key: key(from),
            proxies,
            roots: from.list("ca-file", certificates),
            warnings,
            url,
            sd_file: from.one("sd-file", file_path),
            listen: from.list("TUNNEL_LISTEN_ADDRESS", listen_addresses),
            log: log(from),
        }
    })
}

fn read<T>(
    verb: Verb, matches: &ArgMatches, var: Variables, judge: impl FnOnce(&mut Sources) -> T,
) -> Result<T, Vec<String>> {
    let mut from = Sources { verb, matches, var, errors: Vec::new() };
    let settings = judge(&mut from);
    from.errors.dedup(); // an option may be looked at twice
    if from.errors.is_empty() { Ok(settings) } else { Err(from.errors) }
}

fn read_discovery(from: &mut Sources) -> Discovery {
    let mut warnings = Vec::new();
    let key = key(from);
    let (proxies, proxy_warnings) = Proxies::from_env(from.var);
    warnings.extend(proxy_warnings);
    let url = from.one("api-url", api_url);
    warnings.extend(unencrypted(&url));
    let address = address(from);
    let exporters = exporters(from);
    check_exporters(&exporters, address, &mut from.errors, &mut warnings);
    let selection = Selection {
        fleets: from.list("fleet", |text| items(text).map(FleetRef::parse).collect()),
        tags: from.all("tag", TagFilter::parse),
    };
    let rules = Rules {
        address,
        exporters,
        own_tags: from.one("own-tags", |text| {
            one_of(text, [OwnTags::Narrow, OwnTags::All, OwnTags::Off].map(|mode| (mode.as_str(), mode)))
        }),
        public_domain: from.one("public-domain", domain),
        lan: lan(from, address),
        labels: LabelSet { table: LABELS, chosen: from.one("labels", plain_labels) },
        online_only: from.one("online-only", boolean),
        tags: selection.tags.clone(),
    };
    let (once, dry_run) = (from.one("oneshot", boolean), from.one("dry-run", boolean));
    Discovery {
        api: Api {
            url: url.as_str().trim_end_matches('/').to_owned(),
            key,
            proxies,
            roots: from.list("ca-file", certificates),
            timeout: from.one("timeout", |text| duration(text, 3600)),
        },
        selection,
        rules,
        service_labels: from.one("service-labels", boolean),
        sd_file: from.one("sd-file", file_path),
        sd_file_mode: from.one("sd-file-mode", mode),
        write_empty: from.one("write-empty", boolean),
        refresh: Some(from.one("refresh", interval)).filter(|_| !once && !dry_run),
        dry_run,
        log: log(from),
        status: status::Settings {
            listen: from.list("listen", listen_addresses),
            device_refresh: from.one("device-refresh", interval),
            device_metrics: from.one("device-metrics", boolean),
        },
        tunnel: from.one("tunnel-url", api_url),
        warnings,
    }
}

fn log(from: &mut Sources) -> logging::Settings {
    logging::Settings {
        level: from.one("log-level", |text| text.parse().map_err(|_| "no such level".into())),
        filter: from.all("RUST_LOG", log_filter).pop(),
        json: from.one("log-format", |text| one_of(text, [("text", false), ("json", true)])),
    }
}

fn log_filter(text: &str) -> Result<String, String> {
    env_filter::Builder::new().try_parse(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

fn listen_addresses(text: &str) -> Result<Vec<SocketAddr>, String> {
    net::server::addresses(text)
}

const NO_KEY: &str = "API_KEY is not set: create a named API key in balenaCloud's dashboard (Preferences, Access \
    tokens) and set API_KEY to it, or API_KEY_FILE to a file that holds it";

fn key(from: &mut Sources) -> KeySource {
    let before = from.errors.len();
    let key = match (from.given("API_KEY"), from.given("api-key-file")) {
        (Some(_), Some((source, _))) => Err(format!("API_KEY and {source} are both set: set one of them")),
        (Some((source, values)), None) => {
            ApiKey::new(&values[0]).map(|key| (key, None)).map_err(|error| format!("{source} {error}"))
        }
        (None, Some((source, values))) => key_from_file(&source, &values[0]).map(|(key, path)| (key, Some(path))),
        (None, None) => Err(NO_KEY.into()),
    };
    let (key, file) = key.unwrap_or_else(|error| {
        // What is wrong with the variable itself was reported already.
        from.errors.extend((from.errors.len() == before).then_some(error));
        (ApiKey::default(), None)
    });
    KeySource::new(key, file)
}

fn key_from_file(source: &str, value: &str) -> Result<(ApiKey, PathBuf), String> {
    let path = PathBuf::from(value);
    // The value may be the key itself, by mistake.
    let is_path = value.contains(['/', '.']) || path.exists();
    let shown = if is_path { format!("{value:?}") } else { "not shown".into() };
    let key = ApiKey::read(&path)
        .map_err(|error| format!("{source} is {shown}: the file {error}; it takes the path of a file with the key"))?;
    Ok((key, path))
}

fn address(from: &mut Sources) -> Address {
    let modes = [Address::Vpn, Address::Public, Address::Lan].map(|address| (address.as_str(), address));
    let (chosen, address) = (from.given("address"), from.one("address", |text| one_of(text, modes)));
    if !from.one("USE_PUBLIC_URLS", boolean) {
        return address;
    }
    if let Some((source, values)) = chosen.filter(|_| address != Address::Public) {
        from.errors.push(format!("USE_PUBLIC_URLS is true, but {source} is {}: set one of them", values.join(" ")));
    }
    Address::Public
}

/// The machine's own addresses matter where devices are reached in a LAN.
fn lan(from: &mut Sources, address: Address) -> Lan {
    let own = if address == Address::Lan { net::interfaces::addresses() } else { Ok(Vec::new()) };
    let own = own.map_err(|error| from.errors.push(error)).unwrap_or_default();
    Lan { networks: from.list("lan-network", lan::networks), own }
}

/// The exporters of each device: a list, or `none`.
fn exporters(from: &mut Sources) -> Vec<Exporter> {
    let is_none = |text: &str| text.trim() == "none";
    if let Some((_, values)) = from.given("exporter")
        && values.iter().all(|value| is_none(value))
    {
        return Vec::new();
    }
    from.list("exporter", |text| {
        if is_none(text) {
            Err("stands for no exporter, and others are named".into())
        } else {
            exporter::parse_list(text)
        }
    })
}

/// Prometheus tells targets apart by job and address, and all public URLs of a device are one address.
fn check_exporters(list: &[Exporter], address: Address, errors: &mut Vec<String>, warnings: &mut Vec<String>) {
    let public = address == Address::Public;
    for (index, exporter) in list.iter().enumerate() {
        let same = |other: &&Exporter| other.name == exporter.name && (public || other.port == exporter.port);
        if let Some(other) = list[..index].iter().find(same) {
            let same = "are the same target to Prometheus: give each its own name";
            errors.push(format!("exporters (--exporter, EXPORTERS) {other} and {exporter} {same}"));
        }
        if public && exporter.port != 80 {
            let port = exporter.port;
            warnings.push(format!("exporter {exporter}: a public device URL leads to port 80, {port} is not used"));
        }
    }
}

/// A plain http or https URL.
fn api_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text.trim()).map_err(|_| "not a whole URL")?;
    let bare = [url.query(), url.fragment(), url.password()] == [None; 3] && url.username().is_empty();
    let good = matches!(url.scheme(), "http" | "https") && url.has_host() && bare;
    good.then_some(url).ok_or("not a plain http or https URL".into())
}

/// A warning, if the key would go over the network in clear.
fn unencrypted(url: &Url) -> Option<String> {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let local = host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    (url.scheme() == "http" && !local).then(|| format!("the API key travels unencrypted to {url}: use https"))
}

/// The certificates of a PEM file.
fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = std::fs::read(path).map_err(|error| format!("the file cannot be read: {error}"))?;
    let roots: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|_| "the file is not PEM")?;
    if roots.is_empty() { Err("the file holds no certificate".into()) } else { Ok(roots) }
}

fn domain(text: &str) -> Result<String, String> {
    let is_part = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let good = text.len() <= 190 && text.split('.').all(is_part);
    good.then(|| text.to_ascii_lowercase()).ok_or("not a domain name".into())
}

fn plain_labels(text: &str) -> Result<Vec<&'static str>, String> {
    let known: Vec<_> = labels::plain(LABELS).map(|label| label.name).collect();
    let find = |name: &str| known.iter().find(|label| **label == name).copied();
    match text.trim() {
        "all" => Ok(known),
        "none" => Ok(Vec::new()),
        list => items(list)
            .map(|name| find(name).ok_or_else(|| format!("no label {name}, there are {}", known.join(", "))))
            .collect(),
    }
}

/// The path of a file, which need not exist.
fn file_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let is_file = !text.ends_with('/') && path.file_name().is_some() && !path.is_dir();
    is_file.then_some(path).ok_or("names a directory".into())
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8).map_err(|_| "not an octal number")?;
    (0o400..=0o777).contains(&mode).then_some(mode).ok_or("out of range".into())
}
