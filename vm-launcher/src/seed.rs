//! What cloud-init is told: a `NoCloud` seed, which is a small FAT file system of three YAML files.
//!
//! The files are made by a serializer from types: no text of anybody's is put together with YAML here.
//! Nothing in them is secret; the tunnel's private key is made in the guest.

use std::io::{self, Cursor, Write};
use std::net::Ipv4Addr;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use serde::Serialize;

use crate::Spec;

/// The file system's size: the least that holds three files of some KiB.
const BYTES: usize = 512 << 10;
/// By which cloud-init finds it.
const LABEL: [u8; 11] = *b"CIDATA     ";

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct MetaData<'a> {
    /// What is done once an instance is done again for another.
    instance_id: &'a str,
    local_hostname: &'a str,
}

#[derive(Debug, Serialize)]
struct UserData<'a> {
    disable_root: bool,
    ssh_pwauth: bool,
    users: Vec<User<'a>>,
}

#[derive(Debug, Serialize)]
struct User<'a> {
    name: &'a str,
    ssh_authorized_keys: Vec<String>,
}

#[derive(Debug, Serialize)]
struct NetworkConfig {
    version: u8,
    ethernets: Ethernets,
}

#[derive(Debug, Serialize)]
struct Ethernets {
    eth0: Ethernet,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Ethernet {
    r#match: Match,
    set_name: &'static str,
    dhcp4: bool,
    dhcp6: bool,
    accept_ra: bool,
    /// No family asks or answers by itself.
    link_local: [&'static str; 0],
    addresses: [String; 1],
    routes: [Route; 2],
}

#[derive(Debug, Serialize)]
struct Match {
    macaddress: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Route {
    to: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<&'static str>,
    on_link: bool,
}

fn yaml(value: &impl Serialize) -> io::Result<String> {
    serde_saphyr::to_string(value).map_err(io::Error::other)
}

fn user_data(spec: &Spec) -> io::Result<String> {
    let key = spec.ssh_key.iter().map(ToString::to_string).collect();
    let data = UserData {
        disable_root: false,
        ssh_pwauth: false,
        // The consumer is root in the guest.
        users: vec![User {
            name: "root",
            ssh_authorized_keys: key,
        }],
    };
    // By its first line cloud-init knows what it is.
    Ok(format!("#cloud-config\n{}", yaml(&data)?))
}

fn network_config(spec: &Spec) -> NetworkConfig {
    let link = Route {
        to: format!("{}/32", spec.gateway),
        via: None,
        scope: Some("link"),
        on_link: true,
    };
    let consumer = Route {
        to: format!(
            "{}/32",
            if spec.reach.is_empty() {
                *spec.consumer.endpoint.ip()
            } else {
                spec.tunnel.peer
            }
        ),
        via: Some(spec.gateway),
        scope: None,
        on_link: true,
    };
    NetworkConfig {
        version: 2,
        ethernets: Ethernets {
            eth0: Ethernet {
                r#match: Match {
                    macaddress: spec.mac.to_string(),
                },
                set_name: "eth0",
                dhcp4: false,
                dhcp6: false,
                accept_ra: false,
                link_local: [],
                addresses: [format!("{}/32", spec.address)],
                routes: [link, consumer],
            },
        },
    }
}

/// The seed's file system.
pub(crate) fn image(spec: &Spec) -> io::Result<Vec<u8>> {
    let meta_data = MetaData {
        instance_id: spec.name.as_str(),
        local_hostname: spec.name.as_str(),
    };
    let files = [
        ("meta-data", yaml(&meta_data)?),
        ("user-data", user_data(spec)?),
        ("network-config", yaml(&network_config(spec))?),
    ];
    let mut disk = Cursor::new(vec![0; BYTES]);
    let options = FormatVolumeOptions::new().volume_label(LABEL).volume_id(1);
    format_volume(&mut disk, options)?;
    {
        let file_system = FileSystem::new(&mut disk, FsOptions::new())?;
        for (name, text) in files {
            let mut file = file_system.root_dir().create_file(name)?;
            file.write_all(text.as_bytes())?;
            file.flush()?;
        }
        file_system.unmount()?;
    }
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::spec;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::io::Read;

    fn read(image: &[u8], name: &str) -> String {
        let mut disk = Cursor::new(image.to_vec());
        let file_system = FileSystem::new(&mut disk, FsOptions::new()).unwrap();
        let mut text = String::new();
        let mut file = file_system.root_dir().open_file(name).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    fn parsed(image: &[u8], name: &str) -> Value {
        serde_saphyr::from_str(&read(image, name)).unwrap()
    }

    #[test]
    fn the_seed_has_the_guests_facts_under_the_label_that_cloud_init_looks_for() {
        let mut with = spec();
        with.ssh_key = Some(crate::ssh_public_key::tests::KEY.parse().unwrap());
        let seed = image(&with).unwrap();
        let mut disk = Cursor::new(seed.clone());
        let file_system = FileSystem::new(&mut disk, FsOptions::new()).unwrap();
        assert_eq!(file_system.volume_label().trim_end(), "CIDATA");
        assert_eq!(
            parsed(&seed, "meta-data"),
            json!({"instance-id": "web-1", "local-hostname": "web-1"})
        );
        assert!(read(&seed, "user-data").starts_with("#cloud-config\n"));
        assert_eq!(
            parsed(&seed, "user-data")["users"],
            json!([{"name": "root", "ssh_authorized_keys": [crate::ssh_public_key::tests::KEY]}])
        );
        let eth0 = &parsed(&seed, "network-config")["ethernets"]["eth0"];
        assert_eq!(eth0["match"]["macaddress"], "52:54:00:12:34:56");
        assert_eq!(eth0["addresses"], json!(["10.77.0.2/32"]));
        assert_eq!(eth0["dhcp4"], false);
        assert_eq!(
            eth0["routes"][1],
            json!({"to": "192.0.2.10/32", "via": "10.77.0.1", "on-link": true})
        );
        assert_eq!(image(&with).unwrap(), seed, "equal facts, equal seed");
    }

    #[test]
    fn a_guest_without_a_key_lets_nobody_in_by_one() {
        let users = &parsed(&image(&spec()).unwrap(), "user-data")["users"];
        assert_eq!(users[0]["ssh_authorized_keys"], json!([]));
    }

    proptest! {
        #[test]
        fn whatever_is_in_a_string_it_is_one_and_the_same_string_in_the_yaml(text in any::<String>()) {
            let data = UserData {
                disable_root: false,
                ssh_pwauth: false,
                users: vec![User { name: &text, ssh_authorized_keys: vec![text.clone()] }],
            };
            let value: Value = serde_saphyr::from_str(&yaml(&data).unwrap()).unwrap();
            let user = json!({"name": text, "ssh_authorized_keys": [text]});
            prop_assert_eq!(value, json!({"disable_root": false, "ssh_pwauth": false, "users": [user]}));
        }
    }
}
