/* ioctls of /dev/branches: branches_check WHICH VALUE [WHICH VALUE]... */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>

int main(int argc, char **argv)
{
    int fd = open("/dev/branches", O_RDWR);
    if (fd < 0) {
        perror("/dev/branches");
        return 1;
    }
    for (int i = 1; i + 1 < argc; i += 2)
        printf("%d\n", ioctl(fd, 0x700UL + (unsigned long)atoi(argv[i]), atol(argv[i + 1])));
    return 0;
}
