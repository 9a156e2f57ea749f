//! Options → a checked [`Config`]. All errors come at once, before any work.

pub mod options;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::ArgMatches;
use reqwest::Url;
use rustls::pki_types::{CertificateDer, pem::PemObject};

use crate::balena::client::Api;
use crate::balena::key::ApiKey;
use crate::balena::query::FleetRef;
use crate::config::options::{Values, boolean, duration, items, one_of, refresh};
use crate::discovery::exporter::{self, Exporter};
use crate::discovery::steering::TagFilter;
use crate::discovery::target::{Address, PLAIN, Rules};
use crate::logging;
use crate::net::proxy::Proxies;
use crate::status;

/// All that the program is told from outside, checked.
#[derive(Debug)]
pub struct Config {
    /// Where the API is and how to ask it.
    pub api: Api,
    /// Fleets to ask for; none means all that the key sees.
    pub fleets: Vec<FleetRef>,
    /// What makes targets of devices.
    pub rules: Rules,
    /// Path of the target file.
    pub sd_file: PathBuf,
    /// Its permissions.
    pub sd_file_mode: u32,
    /// Whether a list of no targets may replace one that has some.
    pub write_empty: bool,
    /// From the start of one refresh to the start of the next; none: one refresh is all.
    pub refresh: Option<Duration>,
    /// Whether the list goes to standard output, and no file is touched.
    pub dry_run: bool,
    /// What it tells.
    pub log: logging::Settings,
    /// The status endpoint.
    pub status: status::Settings,
    /// balena's VPN proxy.
    pub tunnel: Url,
    /// What is allowed but looks like a mistake; told once at the start.
    pub warnings: Vec<String>,
}

/// Reads flags and variables; errors are for the user, one a mistake.
pub fn read(matches: ArgMatches, var: &dyn Fn(&str) -> Option<OsString>) -> Result<Config, Vec<String>> {
    let mut from = Values { matches, var, errors: Vec::new() };
    let config = judge(&mut from);
    from.errors.dedup(); // an option may be looked at twice
    if from.errors.is_empty() { Ok(config) } else { Err(from.errors) }
}

fn judge(from: &mut Values) -> Config {
    let mut warnings = Vec::new();
    let (key, key_file) = key(from);
    let (proxies, proxy_warnings) = Proxies::from_env(from.var);
    warnings.extend(proxy_warnings);
    let url = from.one("api-url", api_url);
    warnings.extend(unencrypted(&url));
    let address = address(from);
    let exporters = from.list("exporter", exporter::parse_list);
    check_exporters(&exporters, address, &mut from.errors, &mut warnings);
    let rules = Rules {
        address,
        exporters,
        public_domain: from.one("public-domain", domain),
        labels: from.one("labels", labels),
        online_only: from.one("online-only", boolean),
        tags: from.all("tag", TagFilter::parse),
    };
    let fleets = from.list("fleet", |text| items(text).map(FleetRef::parse).collect());
    let (once, dry_run) = (from.one("oneshot", boolean), from.one("dry-run", boolean));
    Config {
        api: Api {
            url: url.as_str().trim_end_matches('/').to_owned(),
            key,
            key_file,
            proxies,
            roots: from.list("ca-file", certificates),
            timeout: from.one("timeout", |text| duration(text, 3600)),
        },
        fleets,
        rules,
        sd_file: from.one("sd-file", file_path),
        sd_file_mode: from.one("sd-file-mode", mode),
        write_empty: from.one("write-empty", boolean),
        refresh: Some(from.one("refresh", refresh)).filter(|_| !once && !dry_run),
        dry_run,
        log: logging::Settings::read(from),
        status: status::Settings::read(from),
        tunnel: from.one("tunnel-url", api_url),
        warnings,
    }
}

const NO_KEY: &str = "API_KEY is not set: create a named API key in balenaCloud's dashboard (Preferences, Access \
    tokens) and set API_KEY to it, or API_KEY_FILE to a file that holds it";

/// The key, and the file that it came from.
pub fn key(from: &mut Values) -> (ApiKey, Option<PathBuf>) {
    let before = from.errors.len();
    let key = match (from.given("API_KEY"), from.given("api-key-file")) {
        (Some(_), Some((source, _))) => Err(format!("API_KEY and {source} are both set: set one of them")),
        (Some((source, values)), None) => {
            ApiKey::new(&values[0]).map(|key| (key, None)).map_err(|error| format!("{source} {error}"))
        }
        (None, Some((source, values))) => {
            let path = PathBuf::from(&values[0]);
            // it may be the key itself, in its file's place
            let is_path = values[0].contains(['/', '.']) || path.exists();
            let shown = if is_path { format!("{:?}", values[0]) } else { "not shown".into() };
            let told = |error| format!("{source} is {shown}: the file {error}; it takes the path of one with the key");
            ApiKey::read(&path).map(|key| (key, Some(path))).map_err(told)
        }
        (None, None) => Err(NO_KEY.into()),
    };
    key.unwrap_or_else(|error| {
        from.errors.extend((from.errors.len() == before).then_some(error));
        (ApiKey::default(), None)
    })
}

fn address(from: &mut Values) -> Address {
    let modes = [("vpn", Address::Vpn), ("public", Address::Public), ("lan", Address::Lan)];
    let (chosen, address) = (from.given("address"), from.one("address", |text| one_of(text, modes)));
    if !from.one("USE_PUBLIC_URLS", boolean) {
        return address;
    }
    if let Some((source, values)) = chosen.filter(|_| address != Address::Public) {
        from.errors.push(format!("USE_PUBLIC_URLS is true, but {source} is {}: set one of them", values.join(" ")));
    }
    Address::Public
}

/// To Prometheus a target is its job and its address; all of a device's public URLs are one address.
fn check_exporters(list: &[Exporter], address: Address, errors: &mut Vec<String>, warnings: &mut Vec<String>) {
    let public = address == Address::Public;
    for (index, exporter) in list.iter().enumerate() {
        let same = |other: &&Exporter| other.name == exporter.name && (public || other.port == exporter.port);
        if let Some(other) = list[..index].iter().find(same) {
            let same = "are the same target to Prometheus: give each a name of its own";
            errors.push(format!("exporters (--exporter, EXPORTERS) {other} and {exporter} {same}"));
        }
        if public && exporter.port != 80 {
            let port = exporter.port;
            warnings.push(format!("exporter {exporter}: a public device URL leads to port 80, {port} is not used"));
        }
    }
}

/// A plain http or https URL.
pub fn api_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text.trim()).map_err(|_| "not a whole URL")?;
    let bare = [url.query(), url.fragment(), url.password()] == [None; 3] && url.username().is_empty();
    let good = matches!(url.scheme(), "http" | "https") && url.has_host() && bare;
    good.then_some(url).ok_or("not a plain http or https URL".into())
}

/// A warning, if the key would go over the network in clear.
pub fn unencrypted(url: &Url) -> Option<String> {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let local = host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    (url.scheme() == "http" && !local).then(|| format!("the API key travels unencrypted to {url}: use https"))
}

/// The certificates of a PEM file.
pub fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, String> {
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

fn labels(text: &str) -> Result<Vec<&'static str>, String> {
    let known: Vec<_> = PLAIN.iter().map(|label| label.name).collect();
    let find = |name: &str| known.iter().find(|label| **label == name).copied();
    match text.trim() {
        "all" => Ok(known),
        "none" => Ok(Vec::new()),
        list => items(list)
            .map(|name| find(name).ok_or_else(|| format!("no label {name}, there are {}", known.join(", "))))
            .collect(),
    }
}

/// The path of a file, which need not be there.
pub fn file_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let is_file = !text.ends_with('/') && path.file_name().is_some() && !path.is_dir();
    is_file.then_some(path).ok_or("names a directory".into())
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8).map_err(|_| "not an octal number")?;
    (0o400..=0o777).contains(&mode).then_some(mode).ok_or("out of range".into())
}
