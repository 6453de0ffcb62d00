//! A virtual machine whose disk is an export, and the kernel's NBD client in one (M5), through upgrades and a death.

use std::{fs, time::Duration};

use everdisk_tests::{
    guest::Guest,
    host::Host,
    nbd::{Address, Exported},
};

/// An interpreted machine on a busy one.
const LIMIT: Duration = Duration::from_secs(90);

/// Writes four MiB of other bytes each pass, throws the kernel's copies away, and compares what the disk has.
const PASSES: &str = r#"
pass() {
    dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
    for part in 0 1 2 3; do
        dd if=/tmp/data of=$1 bs=64k seek=$((part * 200 + $2)) conv=fsync 2>/dev/null
    done
    echo 3 > /proc/sys/vm/drop_caches
    for part in 0 1 2 3; do
        dd if=$1 bs=64k skip=$((part * 200 + $2)) count=16 2>/dev/null | cmp - /tmp/data || return 1
    done
}
"#;

fn script(disk: &str, before: &str, passes: u32, after: &str) -> String {
    format!(
        "{PASSES}{before}\necho guest: begins\nn=0\nwhile [ $n -lt {passes} ]; do pass {disk} $n; n=$((n+1)); echo guest: \
         pass $n; done\n{after}\n"
    )
}

/// Boots a machine, replaces the core while it works, kills one, and waits for its end.
fn through_upgrades(exported: &Exported<'_>, mut guest: Guest) {
    guest.says("guest: begins", LIMIT);
    let (mut upgrades, mut kills) = (0, 0);
    while !guest.has_ended() {
        exported.volume.turn();
        upgrades += 1;
        if upgrades == 4 {
            exported.volume.settled();
            exported.volume.kill_core();
            exported.volume.settled();
            kills += 1;
        }
    }
    let console = guest.end(LIMIT);
    println!("{upgrades} upgrades and {kills} kills during {} passes", console.matches("guest: pass").count());
    assert!(kills == 1 && upgrades >= 5, "the machine was too quick:\n{console}");
    exported.volume.settled();
}

/// M5 M6: an unmodified QEMU and kernel, its disk by virtio on an export: it writes and verifies through upgrades.
#[test]
fn m5_m6_beyond7_a_virtual_machine_has_its_disk_on_an_export_through_upgrades_and_a_kill() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let disk = format!("file={},format=raw,if=virtio,cache=none,discard=unmap", exported.unix.uri_of("v"));
    let guest = Guest::boot(host.root(), &[disk], &script("/dev/vda", "", 10, ""));
    through_upgrades(&exported, guest);
    exported.detach();
}

/// M5 M6: the kernel's own NBD client, with two connections, as nbd-client sets it up.
#[test]
fn m5_m6_beyond7_the_kernels_client_works_through_upgrades_and_a_kill() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let Address::Tcp(address) = &*exported.tcp else { panic!("{exported:?}") };
    let connect = format!("nbd-client 10.0.2.2 {} /dev/nbd0 -N v -b 4096 -C 2 -persist", address.port());
    let before = format!("{connect}\n[ $(cat /sys/block/nbd0/size) = 131072 ]");
    let after = "echo by the kernel | dd of=/dev/nbd0 bs=4096 seek=12500 conv=fsync\nblkdiscard -o 0 -l 1048576 /dev/nbd0\n\
                 nbd-client -d /dev/nbd0";
    let guest = Guest::boot(host.root(), &[], &script("/dev/nbd0", &before, 10, after));
    through_upgrades(&exported, guest);
    // What the machine wrote and what it discarded, seen from here.
    let bytes = fs::read(&exported.volume.path).unwrap();
    assert_eq!(&bytes[12500 * 4096..][..14], b"by the kernel\n");
    assert!(bytes[..1 << 20].iter().all(|byte| *byte == 0));
    exported.detach();
}
