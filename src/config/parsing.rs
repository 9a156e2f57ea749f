//! How the text of options is checked, each alone and those that belong together.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use hyper::Uri;
use reqwest::Url;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::error::ConfigError;
use super::sources::Sources;
use crate::discovery::exporter::{self, Exporter};
use crate::discovery::labels;
use crate::discovery::lan::{self, Lan};
use crate::discovery::target::Address;
use crate::key_renewal::KeySource;
use crate::net::access::{ANY_HOST, Token};
use crate::net::{EnvProxies, Guard};
use crate::secret::{self, BadSecret, CREATE_KEY, Secret};
use crate::values::{BadValue, boolean, items, one_of};

/// The largest file of root certificates, in bytes. Those of all public authorities take 220 KB.
const MAX_CA_FILE_SIZE: u64 = 16 << 20;
/// Such a certificate is not read.
const TRUSTED: &[u8] = b"BEGIN TRUSTED CERTIFICATE";

pub(super) fn log_filter(text: &str) -> Result<String, BadValue> {
    env_filter::Builder::new().try_parse(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// Who may ask the status endpoint or the tunnel, which listens at the address of this option. The host in the address is an
/// allowed name, too. Only the status endpoint has a token.
pub(super) fn guard(from: &mut Sources, listen: &str) -> Guard {
    let mut hosts = from.list("status-host", |text| items(text).map(status_host).collect());
    let listen = from.given(listen).map(|(_, values)| values).unwrap_or_default();
    let listen = listen.iter().filter_map(|address| address.rsplit_once(':'));
    hosts.extend(listen.map(|(host, _)| host.to_ascii_lowercase()).filter(|host| !host.is_empty()));
    Guard { hosts, token: if from.verb == super::options::Verb::Tunnel { None } else { token(from) } }
}

pub(super) fn status_host(text: &str) -> Result<String, BadValue> {
    // A name in one of Docker's networks may have underscores: `baletheus.monitoring_default`.
    let is_host = |text: &str| domain(&text.replace('_', "-")).map(|_| text.to_ascii_lowercase());
    if text == ANY_HOST { Ok(text.to_owned()) } else { is_host(text) }
}

fn token(from: &mut Sources) -> Option<Token> {
    let (given, values) = from.given("status-token-file")?;
    let report = |why| from.report(secret_file(given, &values[0], why, "token of at least 16 characters"));
    Token::read(PathBuf::from(&values[0])).map_err(report).ok()
}

/// What a file that systemd makes should hold.
const CREDENTIAL: &str = "key. In containers of LXC, LXD and Incus, systemd may give an empty file or none (LoadCredential): \
    docs/kubernetes-debian.md says what to set there";

pub(super) fn key(from: &mut Sources) -> KeySource {
    let before = from.errors.len();
    let key = match (from.given("API_KEY"), from.given("api-key-file")) {
        (Some((given, _)), Some((other, _))) => Err(ConfigError::TwoKeys { given, other }),
        (Some((given, values)), None) => {
            secret::key(&values[0]).map(|key| (key, None)).map_err(|why| ConfigError::Key { given, why })
        }
        (None, Some((given, values))) => {
            let path = PathBuf::from(&values[0]);
            let is_credential = (from.var)("CREDENTIALS_DIRECTORY").is_some_and(|folder| path.starts_with(folder));
            let what = if is_credential { CREDENTIAL } else { "key" };
            let key = secret::text(&path)
                .and_then(|text| secret::key(&text))
                .map_err(|why| secret_file(given, &values[0], why, what));
            key.map(|key| (key, Some(path)))
        }
        (None, None) => Err(ConfigError::NoKey),
    };
    let (key, file) = key.unwrap_or_else(|error| {
        // What is wrong with the variable itself was reported already.
        if from.errors.len() == before {
            from.report(error);
        }
        (Secret::default(), None)
    });
    let key = KeySource::new(key, file);
    from.warnings.extend(session_token(&key).into_iter().chain(key.warning()));
    key
}

pub(super) fn proxies(from: &mut Sources) -> EnvProxies {
    let (proxies, warnings) = EnvProxies::from_env(from.var);
    from.warnings.extend(warnings);
    proxies
}

fn secret_file(given: String, path: &str, why: BadSecret, what: &'static str) -> ConfigError {
    // The value may be the secret itself, by mistake. A random one may have slashes, and a session token has dots.
    let is_random = |part: &str| {
        let kinds = [u8::is_ascii_digit, u8::is_ascii_lowercase, u8::is_ascii_uppercase];
        part.len() >= 12 && kinds.iter().all(|kind| part.bytes().any(|byte| kind(&byte)))
    };
    let is_like_one = path.contains(['/', '.']) && !path.contains('@') && !path.split(['/', '.']).any(is_random);
    let is_path = is_like_one || Path::new(path).exists();
    let value = if is_path { format!("{path:?}") } else { format!("not shown, since it may be the {what} itself") };
    ConfigError::SecretFile { given, value, why, what }
}

pub(super) fn address(from: &mut Sources) -> Address {
    let chosen = from.given("address");
    let address = from.one("address", |text| one_of(text, Address::ALL, Address::as_str));
    if !from.one("USE_PUBLIC_URLS", boolean) {
        return address;
    }
    if let Some((given, values)) = chosen.filter(|_| address != Address::Public) {
        from.report(ConfigError::Address { given, value: values.join(" ") });
    }
    Address::Public
}

/// Where the devices of a LAN are. This machine's addresses are read only if devices are reached in a LAN.
pub(super) fn lan(from: &mut Sources, address: Address) -> Lan {
    let own = if address == Address::Lan { lan::own_addresses() } else { Ok(Vec::new()) };
    let own = own.map_err(|error| from.report(ConfigError::Interfaces(error))).unwrap_or_default();
    Lan { networks: from.list("lan-network", lan::networks), own, is_told: false }
}

/// The exporters of each device: a list, or `none`.
pub(super) fn exporters(from: &mut Sources, address: Address) -> Vec<Exporter> {
    let is_none = |item: &str| item == "none";
    let given = from.given("exporter").map(|(_, values)| values).unwrap_or_default();
    if !given.is_empty() && given.iter().flat_map(|value| items(value)).all(is_none) {
        return Vec::new();
    }
    let list = from.list("exporter", |text| {
        if items(text).any(is_none) {
            Err("none means no exporter, but others are named as well".into())
        } else {
            exporter::parse_list(text)
        }
    });
    check_exporters(&list, address == Address::Public, from);
    list
}

/// Reports exporters that are the same target to Prometheus, and warns of ports that are not used.
fn check_exporters(list: &[Exporter], public: bool, from: &mut Sources) {
    for (index, exporter) in list.iter().enumerate() {
        let same = |other: &&Exporter| other.name == exporter.name && (public || other.port == exporter.port);
        if let Some(other) = list[..index].iter().find(same) {
            from.report(ConfigError::SameTarget(other.to_string(), exporter.to_string()));
        }
        if public && exporter.port != 80 {
            let port = exporter.port;
            let warning = format!("exporter {exporter}: a public device URL leads to port 80, {port} is not used");
            from.warnings.push(warning);
        }
    }
}

/// A warning, if the key expires by itself. A session token is a JWT, which has two dots; a named key has none.
fn session_token(key: &KeySource) -> Option<String> {
    let dots = key.current().reveal().bytes().filter(|byte| *byte == b'.').count();
    (dots == 2).then(|| format!("the API key looks like a session token, which expires: {CREATE_KEY}"))
}

/// The URL of the API. Its documentation has URLs that end in the version, which each request adds itself.
pub(super) fn api_url(text: &str) -> Result<Uri, BadValue> {
    let text = text.trim().trim_end_matches('/');
    base_uri(["/v6", "/v7"].iter().find_map(|version| text.strip_suffix(version)).unwrap_or(text))
}

/// A plain http or https URL without a path.
pub(super) fn base_uri(text: &str) -> Result<Uri, BadValue> {
    let url = Url::parse(text.trim()).map_err(|_| "not a whole URL")?;
    let bare = [url.query(), url.fragment(), url.password()] == [None; 3] && url.username().is_empty();
    let uri = url.as_str().parse().ok().filter(|_| matches!(url.scheme(), "http" | "https") && url.has_host() && bare);
    let uri = uri.ok_or("not a plain http or https URL")?;
    match url.path() {
        "/" => Ok(uri),
        _ => Err(format!("a path does not belong there; write {}", url.origin().ascii_serialization()).into()),
    }
}

/// A warning, if the key would go over the network in clear.
pub(super) fn unencrypted(url: &Uri) -> Option<String> {
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
    let local = host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    (url.scheme_str() == Some("http") && !local).then(|| format!("the API key travels unencrypted to {url}: use https"))
}

/// The certificates of a PEM file.
pub(super) fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, BadValue> {
    let pem = secret::bytes(Path::new(path), MAX_CA_FILE_SIZE).map_err(|why| BadValue {
        may_pass: matches!(&why, BadSecret::Unreadable(error) if error.kind() == ErrorKind::NotFound),
        ..format!("the file {why}").into()
    })?;
    let roots: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|_| "the file is not PEM")?;
    for (index, root) in (1..).zip(&roots) {
        let added = RootCertStore::empty().add(root.clone());
        added.map_err(|error| format!("certificate {index} in the file cannot be used: {error}"))?;
    }
    let is_trusted = pem.windows(TRUSTED.len()).any(|text| text == TRUSTED);
    match (roots.is_empty(), is_trusted) {
        (_, true) => {
            Err("the file has a BEGIN TRUSTED CERTIFICATE, OpenSSL's own form: convert it by openssl x509".into())
        }
        (true, false) => Err("the file holds no certificate in PEM".into()),
        (false, false) => Ok(roots),
    }
}

pub(super) fn domain(text: &str) -> Result<String, BadValue> {
    let is_part = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let good = text.len() <= 190 && text.split('.').all(is_part);
    good.then(|| text.to_ascii_lowercase()).ok_or("not a domain name".into())
}

pub(super) fn plain_labels(text: &str) -> Result<Vec<&'static str>, BadValue> {
    let known: Vec<_> = labels::plain().map(|label| label.name).collect();
    let find = |name: &str| known.iter().find(|label| **label == name).copied();
    match text.trim() {
        "all" => Ok(known),
        "none" => Ok(Vec::new()),
        list => items(list)
            .map(|name| find(name).ok_or_else(|| format!("no label {name}, there are {}", known.join(", ")).into()))
            .collect(),
    }
}

/// The path of the target file, which need not exist. Docker makes a directory where a bind mount names a file that does not.
pub(super) fn sd_file(from: &mut Sources) -> PathBuf {
    let path = from.one("sd-file", |text| match Path::new(text).file_name() {
        Some(_) if !text.ends_with('/') => Ok(PathBuf::from(text)),
        _ => Err("it is a directory".into()),
    });
    if path.is_dir() {
        let (source, _) =
            from.given("sd-file").unwrap_or_else(|| ("the default of --sd-file (SD_FILE_PATH)".into(), Vec::new()));
        from.report_value("sd-file", &source, &path.to_string_lossy(), "it is a directory".into());
    }
    path
}

pub(super) fn mode(text: &str) -> Result<u32, BadValue> {
    let mode = u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8).map_err(|_| "not an octal number")?;
    (0o400..=0o777).contains(&mode).then_some(mode).ok_or("out of range".into())
}
