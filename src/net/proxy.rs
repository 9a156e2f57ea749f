//! The proxies that the environment names: which one a URL goes through, for every client of the program.

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;

use base64::prelude::{BASE64_STANDARD, Engine};
use hyper::Uri;
use percent_encoding::percent_decode_str;
use reqwest::Url;

use super::default_port;

/// A proxy. Neither `Display` nor `Debug` shows the user and the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    url: Url,
    variable: &'static str,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (scheme, host) = (self.url.scheme(), self.url.host_str().unwrap_or_default());
        write!(f, "{scheme}://{host}")?;
        if let Some(port) = self.url.port() {
            write!(f, ":{port}")?;
        }
        write!(f, " ({})", self.variable)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

impl Proxy {
    /// Reads `http://` or `https://` URLs; without a scheme it is an http proxy.
    fn parse(text: &str, variable: &'static str) -> Result<Self, &'static str> {
        let whole = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let url = Url::parse(&whole).map_err(|_| "it is no URL of a proxy")?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err("only http:// and https:// proxies are supported");
        }
        if !url.has_host() || url.as_str().parse::<Uri>().is_err() {
            return Err("it is no URL of a proxy");
        }
        Ok(Proxy { url, variable })
    }

    /// As reqwest takes it, for every request of a client.
    ///
    /// # Errors
    /// reqwest cannot use its URL.
    pub fn for_reqwest(&self) -> reqwest::Result<reqwest::Proxy> {
        reqwest::Proxy::all(self.url.clone())
    }

    /// The URL without user and password.
    pub fn uri(&self) -> Uri {
        let mut url = self.url.clone();
        let _ = (url.set_username(""), url.set_password(None)); // an http URL can be without them
        url.as_str().parse().unwrap_or_default()
    }

    /// The value of `Proxy-Authorization`, if the URL has a user.
    pub fn authorization(&self) -> Option<String> {
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let (user, password) = (decoded(self.url.username()), decoded(self.url.password().unwrap_or_default()));
        let is_set = !user.is_empty() || !password.is_empty();
        is_set.then(|| format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}"))))
    }
}

/// The proxies of the environment, and the hosts that are reached without them.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    http: Option<Proxy>,
    https: Option<Proxy>,
    excluded: Vec<Excluded>,
}

impl Proxies {
    /// Reads `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, in upper or lower case. A value that cannot be used is
    /// ignored, with a warning for the log.
    pub fn from_env(var: &dyn Fn(&str) -> Option<OsString>) -> (Self, Vec<String>) {
        let mut warnings = Vec::new();
        let mut given = |names: [&'static str; 2]| {
            let (name, value) =
                names.into_iter().find_map(|name| Some((name, var(name)?)).filter(|(_, v)| !v.is_empty()))?;
            let text =
                value.into_string().map_err(|_| warnings.push(format!("{name} is ignored: it is not UTF-8"))).ok()?;
            let text = text.trim().to_owned();
            if text.is_empty() {
                warnings.push(format!("{name} is ignored: it is blank"));
            }
            Some((name, text)).filter(|(_, text)| !text.is_empty())
        };
        // a CGI program gets HTTP_PROXY from the header `Proxy` of a request
        let http = if var("REQUEST_METHOD").is_some() { None } else { given(["HTTP_PROXY", "http_proxy"]) };
        let [https, all, none] =
            [["HTTPS_PROXY", "https_proxy"], ["ALL_PROXY", "all_proxy"], ["NO_PROXY", "no_proxy"]].map(&mut given);
        let mut read = |given: Option<(&'static str, String)>| {
            let (name, text) = given?;
            let warn = |why| warnings.push(format!("{name} is ignored: {why}; it takes http://HOST:PORT"));
            Proxy::parse(&text, name).map_err(warn).ok()
        };
        let [http, https, all] = [http, https, all].map(&mut read);
        let mut excluded = Vec::new();
        if let Some((name, text)) = none {
            for entry in text.split([',', ' ', '\t']).filter(|entry| !entry.is_empty()) {
                match Excluded::parse(entry) {
                    Some(entry) => excluded.push(entry),
                    None => {
                        warnings.push(format!(
                            "{name} has {entry:?}, which is no host, network or *: this entry is ignored"
                        ));
                    }
                }
            }
        }
        (Proxies { http: http.or_else(|| all.clone()), https: https.or(all), excluded }, warnings)
    }

    /// The proxy for this scheme, host and port, unless the host is excluded.
    pub fn find(&self, scheme: &str, host: &str, port: Option<u16>) -> Option<&Proxy> {
        let proxy = if scheme == "https" { self.https.as_ref() } else { self.http.as_ref() };
        let host = host.trim_matches(['[', ']']).trim_end_matches('.').to_ascii_lowercase();
        let port = port.unwrap_or_else(|| default_port(scheme));
        proxy.filter(|_| !self.excluded.iter().any(|excluded| excluded.matches(&host, port)))
    }
}

/// An entry of `NO_PROXY`: a host or network, with or without a port.
#[derive(Clone, Debug)]
struct Excluded {
    host: Hosts,
    port: Option<u16>,
}

#[derive(Clone, Debug)]
enum Hosts {
    All,
    /// An address and the length of the network's prefix.
    Network(IpAddr, u8),
    /// A domain and all below it.
    Domain(String),
}

impl Excluded {
    fn parse(entry: &str) -> Option<Self> {
        if entry == "*" {
            return Some(Excluded { host: Hosts::All, port: None });
        }
        if let Some(host) = network(entry.trim_matches(['[', ']'])) {
            return Some(Excluded { host, port: None });
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (entry, None),
        };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let domain = || {
            let name = host.strip_prefix('*').unwrap_or(host).trim_matches('.').to_ascii_lowercase();
            let known = |c: char| c.is_alphanumeric() || ".-_".contains(c);
            (!name.is_empty() && name.chars().all(known)).then_some(Hosts::Domain(name))
        };
        let host = if host == "*" { Hosts::All } else { network(bare).or_else(domain)? };
        Some(Excluded { host, port })
    }

    fn matches(&self, host: &str, port: u16) -> bool {
        let is_port = self.port.is_none_or(|excluded| excluded == port);
        let is_host = match &self.host {
            Hosts::All => true,
            Hosts::Network(network, length) => host.parse().is_ok_and(|address| contains(*network, *length, address)),
            Hosts::Domain(domain) => {
                host.strip_suffix(&**domain).is_some_and(|before| before.is_empty() || before.ends_with('.'))
            }
        };
        is_port && is_host
    }
}

/// An address, or a network such as `10.0.0.0/8`.
fn network(text: &str) -> Option<Hosts> {
    let (address, length) = text.split_once('/').map_or((text, None), |(address, length)| (address, Some(length)));
    let address: IpAddr = address.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let length = length.map_or(Some(longest), |length| length.parse().ok().filter(|length| *length <= longest))?;
    Some(Hosts::Network(address, length))
}

fn contains(network: IpAddr, length: u8, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    };
    let different = bits(network) ^ bits(address);
    network.is_ipv4() == address.is_ipv4() && different.leading_zeros() >= u32::from(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(set: &[(&str, &str)]) -> (Proxies, Vec<String>) {
        Proxies::from_env(&|name| set.iter().find(|(set, _)| *set == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn no_proxy_excludes_hosts_networks_and_ports() {
        for (entry, host, port, is_excluded) in [
            ("*", "a.test", 443, true),
            ("a.test", "a.test", 443, true),
            ("A.Test.", "x.a.test", 443, true),
            (".a.test", "x.a.test", 443, true),
            ("*.a.test", "x.a.test", 443, true),
            ("a.test", "ba.test", 443, false),
            ("a.test:443", "a.test", 443, true),
            ("a.test:8443", "a.test", 443, false),
            ("b.test, a.test", "a.test", 443, true),
            ("b.test a.test", "a.test", 443, true),
            (" * ", "a.test", 443, true),
            ("10.0.0.0/8", "10.1.2.3", 443, true),
            ("10.0.0.0/8", "11.1.2.3", 443, false),
            ("10.1.2.3:443", "10.1.2.3", 443, true),
            ("10.1.2.3:80", "10.1.2.3", 443, false),
            ("0.0.0.0/0", "::1", 443, false),
            ("::1", "[::1]", 443, true),
            ("[::1]:443", "::1", 443, true),
            ("fd00::/8", "fd12::1", 443, true),
        ] {
            let (proxies, warnings) = proxies(&[("HTTPS_PROXY", "proxy.test:3128"), ("NO_PROXY", entry)]);
            assert_eq!(warnings, [""; 0], "{entry}");
            assert_eq!(proxies.find("https", host, Some(port)).is_none(), is_excluded, "{entry} {host}:{port}");
        }
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_a_warning_without_its_password() {
        for bad in ["socks5://u:secret@proxy.test", "http://u:secret@", "http://u:secret@ho st", "://secret"] {
            let (proxies, warnings) = proxies(&[("HTTPS_PROXY", bad)]);
            assert!(proxies.find("https", "a.test", None).is_none(), "{bad}");
            assert!(
                matches!(&warnings[..], [one] if one.starts_with("HTTPS_PROXY ") && !one.contains("secret")),
                "{bad}"
            );
        }
        let (found, warnings) =
            proxies(&[("https_proxy", "https://u:s%20t@proxy.test:8443"), ("NO_PROXY", "http://x")]);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let proxy = found.find("https", "a.test", None).unwrap();
        assert_eq!(format!("{proxy} {proxy:?}").matches("u:").count(), 0);
        assert_eq!(proxy.to_string(), "https://proxy.test:8443 (https_proxy)");
        assert_eq!(proxy.uri(), "https://proxy.test:8443/");
        assert_eq!(proxy.authorization(), Some(format!("Basic {}", BASE64_STANDARD.encode("u:s t"))));
    }
}
