//! Options → the checked settings of each command. All errors are reported together, before any work.

mod command;
mod error;
mod misspelt;
mod options;
mod parsing;
mod sources;

use std::ffi::OsString;
use std::mem;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ArgMatches;
use hyper::Uri;

use crate::balena::{Api, BALENA_CLOUD, FleetRef, Selection, TagFilter};
use crate::discovery::tags::OwnTags;
use crate::discovery::target::{Address, Rules};
use crate::net::server::addresses;
use crate::values::{boolean, duration, interval, items, one_of};
use crate::{check, device_state, logging, status, tunnel};
pub use command::{command, completed, key_files, mistake};
pub use error::ConfigError;
pub use misspelt::misspelt;
pub use options::{OPTIONS, Opt, Verb};
use parsing::{
    address, api_url, base_uri, certificates, domain, exporters, guard, key, lan, log_filter, mode, plain_labels,
    proxies, sd_file, unencrypted,
};
use sources::Sources;

/// balenaCloud's pages for people. An openBalena has none.
const DASHBOARD: &str = "https://dashboard.balena-cloud.com";

pub type Variables<'a> = &'a dyn Fn(&str) -> Option<OsString>;

#[derive(Debug)]
pub struct DiscoverySettings {
    pub api: Api,
    pub selection: Selection,
    pub rules: Rules,
    pub sd_file: PathBuf,
    pub sd_file_mode: u32,
    /// Whether a list without targets may replace one that has some.
    pub write_empty: bool,
    /// From the start of one refresh to the start of the next; none means a single refresh.
    pub refresh: Option<Duration>,
    /// Whether the list goes to standard output and no file is touched.
    pub dry_run: bool,
    pub log: logging::Settings,
    pub status: status::Settings,
    /// balena's VPN proxy, for `check`.
    pub tunnel: Uri,
}

pub fn discovery(matches: &ArgMatches, var: Variables) -> Result<DiscoverySettings, Vec<ConfigError>> {
    read(Verb::Discover, matches, var, read_discovery)
}

pub fn check(matches: &ArgMatches, var: Variables) -> Result<check::Settings, Vec<ConfigError>> {
    read(Verb::Check, matches, var, |from| {
        let DiscoverySettings { api, selection, rules, tunnel, mut log, .. } = read_discovery(from);
        let is_vpn = rules.address == Address::Vpn;
        log.warnings.extend(unencrypted(&tunnel).filter(|_| is_vpn));
        if is_vpn && api.url != BALENA_CLOUD && from.given("tunnel-url").is_none() {
            let url = &api.url;
            log.warnings.push(format!(
                "the key of {url} goes to {tunnel}: set --tunnel-url (TUNNEL_URL) to that server's proxy"
            ));
        }
        let name = matches.get_one::<String>("name").map(|name| name.trim().to_owned());
        if name.as_deref() == Some("") {
            from.report(ConfigError::NoName);
        }
        check::Settings {
            api,
            selection,
            rules,
            tunnel,
            name,
            failing: matches.get_flag("failing"),
            form: match (matches.get_flag("json"), matches.get_flag("report")) {
                (true, _) => check::Form::Json,
                (_, true) => check::Form::Anonymous,
                _ => check::Form::Table,
            },
            log,
        }
    })
}

pub fn tunnel(matches: &ArgMatches, var: Variables) -> Result<tunnel::Settings, Vec<ConfigError>> {
    read(Verb::Tunnel, matches, var, |from| {
        let url = from.one("tunnel-url", base_uri);
        let key = key(from);
        let proxies = proxies(from);
        from.warnings.extend(unencrypted(&url));
        tunnel::Settings {
            key,
            proxies,
            roots: from.list("ca-file", certificates),
            url,
            sd_file: sd_file(from),
            listen: from.list("TUNNEL_LISTEN_ADDRESS", addresses),
            guard: guard(from, "TUNNEL_LISTEN_ADDRESS"),
            log: log(from),
        }
    })
}

fn read<T>(
    verb: Verb, matches: &ArgMatches, var: Variables, judge: impl FnOnce(&mut Sources) -> T,
) -> Result<T, Vec<ConfigError>> {
    let mut from = Sources { verb, matches, var, errors: Vec::new(), warnings: Vec::new() };
    let settings = judge(&mut from);
    if from.errors.is_empty() { Ok(settings) } else { Err(from.errors) }
}

fn read_discovery(from: &mut Sources) -> DiscoverySettings {
    let key = key(from);
    let proxies = proxies(from);
    let url = from.one("api-url", api_url);
    from.warnings.extend(unencrypted(&url));
    let address = address(from);
    let exporters = exporters(from, address);
    let selection = Selection {
        fleets: from.list("fleet", |text| items(text).map(FleetRef::parse).collect()),
        tags: from.all("tag", TagFilter::parse),
    };
    let rules = Rules {
        address,
        exporters,
        own_tags: from.one("own-tags", |text| one_of(text, OwnTags::ALL, OwnTags::as_str)),
        public_domain: from.one("public-domain", domain),
        lan: lan(from, address),
        labels: from.one("labels", plain_labels),
        online_only: from.one("online-only", boolean),
        tags: selection.tags.clone(),
        service_labels: from.one("service-labels", boolean),
    };
    let sd_file = sd_file(from);
    from.warnings.extend(unread(&sd_file));
    let is_cloud = url.host().is_some_and(|host| BALENA_CLOUD == format!("https://{host}"));
    let url = url.to_string().trim_end_matches('/').to_owned();
    let once = from.one("oneshot", boolean);
    let dry_run = from.one("dry-run", boolean);
    DiscoverySettings {
        api: Api {
            url,
            key,
            proxies,
            roots: from.list("ca-file", certificates),
            timeout: from.one("timeout", |text| duration(text, 3600)),
        },
        selection,
        rules,
        sd_file,
        sd_file_mode: from.one("sd-file-mode", mode),
        write_empty: from.one("write-empty", boolean),
        refresh: Some(from.one("refresh", interval)).filter(|_| !once && !dry_run),
        dry_run,
        status: endpoint(from, is_cloud),
        tunnel: from.one("tunnel-url", base_uri),
        log: log(from),
    }
}

fn endpoint(from: &mut Sources, is_cloud: bool) -> status::Settings {
    status::Settings {
        listen: from.list("listen", addresses),
        guard: guard(from, "listen"),
        watch: device_state::polling::Settings {
            interval: from.one("device-refresh", interval),
            services: from.one("device-services", boolean),
            reports: from.one("device-metrics", boolean),
        },
        dashboard: is_cloud.then_some(DASHBOARD),
    }
}

/// A warning about a target file whose name Prometheus does not take (`patFileSDName` in its `discovery/file/file.go`).
fn unread(path: &Path) -> Option<String> {
    let ends = ["json", "yml", "yaml", "JSON", "YML", "YAML"];
    let is_read = path.extension().is_some_and(|extension| ends.iter().any(|end| extension == *end));
    let name = path.display();
    (!is_read).then(|| format!("--sd-file (SD_FILE_PATH) is {name}: Prometheus reads only .json, .yml and .yaml files"))
}

/// How the program logs, and the warnings so far: it is read last.
fn log(from: &mut Sources) -> logging::Settings {
    logging::Settings {
        level: from.one("log-level", |text| text.parse().map_err(|_| "no such level".into())),
        filter: from.all("RUST_LOG", log_filter).pop(),
        json: from.one("log-format", |text| one_of(text, &[false, true], |json| if json { "json" } else { "text" })),
        warnings: mem::take(&mut from.warnings),
    }
}
